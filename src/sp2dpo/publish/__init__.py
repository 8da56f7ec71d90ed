"""Publishing: a run directory to a folder that others can load. J.4.

`dataset` makes a dataset folder of the Hugging Face hub, `trainers` the files that other trainers read. Both read the
run and change nothing in it; the same run gives the same bytes. Only `hub` reaches the network.
"""
