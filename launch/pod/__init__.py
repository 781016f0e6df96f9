"""The laptop's half of launch/tpu_pod.sh: from this machine to a finished run on a Cloud TPU slice.

`decide.decide` is the state machine; `watch` looks, asks it and acts. Needs Python's standard library alone.
"""
