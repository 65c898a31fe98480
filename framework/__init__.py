"""Trains, studies, measures and shows what `blocks` composes. Importing this package imports nothing heavy."""

from framework.imports import install

install()
