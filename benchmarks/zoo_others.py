"""Models that are not language models or image classifiers of transformers."""
OTHERS = {}
