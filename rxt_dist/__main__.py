"""`python -m rxt_dist`: the way in which launchers start ranks."""

from rxt_dist.cli import program

program()
