"""Static gates on the machine code of all that configs.py can choose: `python -m tests.gates`."""
