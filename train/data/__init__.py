"""The images of a run: sources, lanes (cursors through the sources), and the stream of crops."""
