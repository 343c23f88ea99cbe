"""How concentrated refusal is in a model: measured by ablating directions at run time, nothing is written."""
