"""Load what `--model` names, as a model that the evaluation can call."""
