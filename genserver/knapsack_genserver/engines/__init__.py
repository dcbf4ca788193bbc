"""Engines: what generates behind the one interface of ``engine.py``."""
