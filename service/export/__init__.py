"""Registered models as files of other tools, each loaded by that tool and compared before it is left behind."""
