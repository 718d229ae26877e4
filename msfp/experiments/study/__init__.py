"""A study of quantization recipes on the reference models, which anyone can run again."""
