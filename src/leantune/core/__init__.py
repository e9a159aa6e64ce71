"""What every other room stands on: errors, atomic files. Torch and the standard library only."""
