"""The same turn, written for one kind of chip: arrays in, arrays out. Chosen by ``_turn``, one file a chip."""
