"""Files that one room writes and others read. Each module owns one kind: its type, names, version, write and read.

`rollouts`: groups that training saved for inspection; `evaluation`: the images behind a report; `restoration`: the
record of a restored image. `gallery`, `compare`, `evaluate` and `restore` read them only through these modules.
"""
