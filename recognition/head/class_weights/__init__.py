"""A rank's class weights: how they are stored, their gradient, and the optimizers that move them."""
