"""Recorded slots as numpy arrays: where they come from (`sources`), what is known of their engines (`engines`), the
tables of steps and requests (`tables`), and the rules for values that are not known (`columns`, `levels`, `rows`).

Everything here reads. Numbers are made of it in `kvhook.analysis`; `kvhook.Trace` is the public object on top.
"""
