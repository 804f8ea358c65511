"""Products and attention behind one signature each; the model never asks which implementation runs."""
