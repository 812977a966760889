"""Experiments: data, configurations and one command for each result, from a checkout of the repository.

Not part of the installed package. Shared by all of them:

* `experiments.data` loads a data set as train, validation and test splits, and hands out checkpointable batches;
* `experiments._selection` makes every choice on the validation split, and writes down how it was made;
* `experiments._results` is the form of `experiments/results/NAME.json`; `python -m experiments.tables` renders
  those files into the tables of `experiments/README.md`.

Test data are read once for each final model: `Dataset.test` keeps the log, and a result is refused without it.
"""
