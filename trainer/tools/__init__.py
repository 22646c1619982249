"""Tools beside training: functions first, then their place in the command line and the tab."""
