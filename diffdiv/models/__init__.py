"""Denoisers over diffusers backbones, generators and discriminator heads."""
