"""The command line: what the verbs take, and what a terminal shows. It decides nothing itself."""
