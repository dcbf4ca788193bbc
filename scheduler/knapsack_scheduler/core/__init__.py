"""Pure allocation core: numbers in, a decision with its reasons out.

Nothing here awaits, logs, reads a clock, draws randomness or knows protobuf. Every
vector is reproducible bit by bit on any IEEE-754 machine: it is made with additions,
multiplications and divisions in a fixed order, never with a library's pow or log.
"""
