"""The page: what is known of the ports, the rates computed from samples, and the HTML that shows both."""
