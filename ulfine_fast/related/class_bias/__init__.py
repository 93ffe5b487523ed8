"""How far a classifier favours the classes that its encoder and its labels favour.

`bias` (the measures), `section` (the section it adds to the report, through `report/plugins.py`).
"""
