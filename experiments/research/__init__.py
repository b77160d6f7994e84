"""What only a functional library can do: each program is measured, and runs small in the tests."""
