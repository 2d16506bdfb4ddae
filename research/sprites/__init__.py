"""Training of the shipped model, stage by stage; `research/train_sprites.py` runs it."""
