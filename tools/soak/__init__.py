"""The mini study for an hour, with its memory, handles and disk watched."""
