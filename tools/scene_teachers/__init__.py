"""How the three scenes teachers that the package contains were made."""
