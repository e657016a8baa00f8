"""Pure functions over recorded arrays: arrays in, numbers out. Nothing here reads files or knows vLLM."""
