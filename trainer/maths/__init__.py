"""Pure tensor functions, named after what the papers call them."""
