"""The paper's pictures: heat maps and curves in one style, and which runs are one line of them."""
