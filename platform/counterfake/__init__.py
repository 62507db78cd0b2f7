"""counterfake: make fakes to catch fakes. Rooms and who may import whom: tests/test_layout.py."""

__version__ = "0.1.0"
