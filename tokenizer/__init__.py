"""The model: quantizer, BSQ-ViT, codes, checkpoints."""
