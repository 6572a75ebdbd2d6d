"""The pictures of a run: sources, the lanes that go through them, and the stream of crops they give."""
