"""The fixture `fake(name, ...)` registers tuners of a made-up distribution."""

from tests.fake_plugin import fake

__all__ = ["fake"]
