"""How ranks meet, resume and end."""
