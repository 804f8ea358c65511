"""The commands behind `train.py`, `sample.py` and `convert.py`, once installed `ling-train` and so on."""
