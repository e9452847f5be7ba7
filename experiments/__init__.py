"""Questions asked of real photographs, with the settings that answer them."""
