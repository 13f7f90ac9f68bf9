"""Checkpoints on the disk: no engine, no process group, and nothing of a plan in them.

tensors     safetensors files: written one tensor after the other, read box by box
index       what a checkpoint holds, as plain data; everything it says is checked
folder      one folder for each step, which appears whole
checkpoint  one of them, open to be read
exchange    weights out of one as other programs read them, and into one
verbs       its commands
"""
