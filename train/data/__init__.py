"""The images of a run: sources, streams (cursors through the sources), and their crops."""
