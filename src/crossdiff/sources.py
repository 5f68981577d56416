"""The names of the two sources, in the order of every source axis."""

BASE, CHAT = "base", "chat"
SOURCES = (BASE, CHAT)
