"""Pure torch: likelihood, energy distance, VAE and operators."""
