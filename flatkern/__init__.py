"""flatkern: how flat a loss is, how compressed a representation is, cheaply and with error bars."""
