"""The command line: one small module per verb. main (dispatch, errors), options (config), then a module per verb."""
