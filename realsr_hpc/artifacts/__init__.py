"""Files that one room writes and others read. Each module owns one kind: its type, names, version, write and read.

`rollouts` are groups that training kept for people, `evaluation` the images behind a report, `restoration` what stands
beside a restored image. `gallery`, `compare`, `evaluate` and `restore` read them here and nowhere else.
"""
