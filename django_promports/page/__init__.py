"""The page for people: a look at the ports, the rates of what workers did, and the HTML that shows them."""
