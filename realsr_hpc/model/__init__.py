"""The Chameleon-shaped policy on Megatron-Core: spec, precision, weights in and out."""
