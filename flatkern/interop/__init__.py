"""Bridges to training frameworks; each module needs its framework installed."""
