"""Ways to round the weights of a layer to its grid."""
