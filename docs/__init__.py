"""The site: pages, settings, and the tables made from measured files."""
