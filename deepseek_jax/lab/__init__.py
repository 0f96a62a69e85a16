"""The workbench: studies of the papers' claims, their runs, and the verdicts that follow from them."""
