"""What runs came to, in figures and on a page that needs no network."""
