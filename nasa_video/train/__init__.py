"""NASA-T: distillation with the negative prompt inside (arXiv 2412.02687, section 5.3), for images and causal video."""
