"""Training of the shipped model, stage by stage; `scripts/train_sprites.py` runs it."""
